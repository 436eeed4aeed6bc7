"""The commands of the command line, in groups; their heavy imports wait until a command runs."""
