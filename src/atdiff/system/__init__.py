"""Files, locks, memory, processes and the network: everything that depends on the machine."""
