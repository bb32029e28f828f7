"""The pages of README.md that show a manager of containers, executed command by command."""
