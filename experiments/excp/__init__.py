"""Evidence for ExCP: real training runs, what coding does to a resume, and how large saves become."""
