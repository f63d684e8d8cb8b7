"""The commands of `layout-advisor`, a file each."""
