"""One module a command; each imports heavy libraries only inside its functions."""
