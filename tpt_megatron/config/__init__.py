"""One checked, frozen config a stage: YAML file or shipped recipe, with dotted `key=value` overrides."""
