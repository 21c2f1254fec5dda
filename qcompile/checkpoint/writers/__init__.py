"""Writers of folders and files that other programs serve: each stores the codes that were chosen here, unchanged."""
