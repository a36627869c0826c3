"""The commands of the command line beside `run`, a file each; `main` takes the arguments and returns the exit code."""
