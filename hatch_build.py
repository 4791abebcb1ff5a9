"""Build hook: a wheel carries the YAML files of configs/ inside attnzoo_recipes.

An editable install reads them from the repository; a forced include there would put a second,
stale copy into site-packages, so only the standard build gets it.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfigsHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name == "wheel" and version == "standard":
            build_data["force_include"]["configs"] = "attnzoo_recipes/configs"
