"""The command line `convllava`, one file per topic."""
