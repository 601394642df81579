"""Print the results of commands as text: tables on stdout, remarks on stderr."""
