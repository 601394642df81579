from convlens.cli import run

run()
