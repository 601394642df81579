"""What commands found, as people read it: tables on stdout, remarks on stderr."""
