"""What stands between convlens and the machine: files, the screen, signals, the environment."""
