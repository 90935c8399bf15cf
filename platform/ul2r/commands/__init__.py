"""The verbs of `ul2r`, one module each: parse a command line, call what does the work, print its result."""
