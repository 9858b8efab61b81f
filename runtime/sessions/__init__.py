"""One file per backend; each is the only one that imports its driver package, and only when it is used."""
