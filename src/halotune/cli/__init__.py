"""The command line: `main` starts it; one module a command, which reads the options and calls the library."""
