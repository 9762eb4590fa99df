"""Swift on disks that hang."""
