"""Files, console output, signals, environment variables and YAML: the operating system's side."""
