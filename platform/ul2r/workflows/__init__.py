"""The work of each job: one file per job of the same name, and the command line that all of them share."""
