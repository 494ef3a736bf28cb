"""The commands a user types; each has a main(argv)."""
