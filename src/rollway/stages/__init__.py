"""One module per stage. Each `run(spec, *, files...)` reads top to bottom; its signature is the command line."""
