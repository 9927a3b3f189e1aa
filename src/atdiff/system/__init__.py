"""Files, locks, memory, processes and the network: what atdiff needs of the machine."""
