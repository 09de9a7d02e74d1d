"""Engine profiles: one YAML file per engine."""
