"""A hook of MkDocs: reference pages made from the command line's parser and the schema of recipes."""

from __future__ import annotations

import importlib.resources
import inspect
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from atdiff.cli import COMMANDS


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link to the repository, where one is known that has a page."""
    config.repo_url = config.repo_url or repository(Path(config.config_file_path).parent)
    if config.repo_url:
        config.repo_name = config.repo_url.rpartition("/")[2]
    return config


def repository(root: Path) -> str | None:
    """Return the address of the repository: ``ATDIFF_REPOSITORY``, or that of the clone's origin; None without any."""
    address = os.environ.get("ATDIFF_REPOSITORY", "")
    if not address:
        asked = ["git", "-C", str(root), "config", "--get", "remote.origin.url"]
        try:
            address = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:  # no git, as in an archive of the sources
            return None
    # git@HOST:OWNER/NAME and ssh://git@HOST/OWNER/NAME have their pages at https://HOST/OWNER/NAME.
    web = re.sub(r"^(?:ssh://)?git@([^/:]+)[:/]", r"https://\1/", address).removesuffix(".git")
    return web if web.startswith(("https://", "http://")) and "@" not in web else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, content in {"reference/commands.md": commands_page(), "reference/recipe-keys.md": keys_page()}.items():
        files.append(File.generated(config, path, content=content))
    return files


def commands_page() -> str:
    """Every command with its options."""
    lines = [
        "# Commands",
        "",
        "`RUN` is a training folder, a diffusers pipeline folder, or a hub id; `RECIPE` a bundled recipe or a YAML "
        "file. Exit codes: 0 done; 2 a mistake of yours (one sentence, nothing written); 75 stopped, all saved; 1 the "
        "disk failed or losses were not finite, the last good checkpoint kept; 130 Ctrl-C outside of training.",
    ]
    for name, command in COMMANDS.items():
        context = click.Context(command, info_name=f"atdiff {name}")
        lines += ["", f"## atdiff {name}", "", inspect.cleandoc(command.help or ""), ""]
        lines += ["```bash", *command.examples, "```", "", "| argument | |", "|---|---|"]
        for option in command.params:
            shown = option.get_help_record(context) or (option.human_readable_name, "")
            lines.append("| `{}` | {} |".format(*(text.replace("|", "\\|") for text in shown)))
        if command.takes_settings:
            lines.append("| `--any.key VALUE` | a setting of the recipe; see [Recipe keys](recipe-keys.md) |")
    return "\n".join(lines) + "\n"


def keys_page() -> str:
    """Every key of a recipe with its type, default and meaning."""
    schema: dict[str, Any] = json.loads(
        (importlib.resources.files("atdiff") / "recipes" / "recipe.schema.json").read_text()
    )
    lines = ["# Recipe keys", "", "Each can be set on the command line too: `--training.passes 500`."]
    for name, key in schema["properties"].items():
        section = schema["$defs"].get(key.get("$ref", "").rpartition("/")[2])
        if section is None or name in ("finetune", "arms"):
            continue
        lines += ["", f"## {name}", section["description"], "", "| key | type | default | |", "|---|---|---|---|"]
        for part, of in section["properties"].items():
            default = json.dumps(of["default"]) if "default" in of else ""
            lines.append(f"| `{part}` | {_type(of)} | `{default}` | {of['description']} |")
    lines += ["", "## The rest of a recipe", "", "| key | |", "|---|---|"]
    lines += [
        f"| `{name}` | {schema['properties'][name]['description']} |"
        for name in ("title", "about", "cost", "finetune", "arms")
    ]
    return "\n".join(lines) + "\n"


def _type(key: dict[str, Any]) -> str:
    if "enum" in key:
        return ", ".join(f"`{choice}`" for choice in key["enum"])
    if "anyOf" in key:
        return " or ".join(_type(one) for one in key["anyOf"])
    kind = key.get("type", "")
    if kind == "array":
        items = key.get("items") or (key.get("prefixItems") or [{}])[0]
        return f"list of {_type(items) or 'any'}"
    return {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "null": "null",
        "object": "mapping",
    }.get(kind, kind)
