"""One module per stage. Each `run(spec, *, files...)` reads top to bottom; the command line is made from its signature."""
