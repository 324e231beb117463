"""The commands of the command line; each module registers itself on the app."""
