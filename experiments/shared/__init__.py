"""What experiments share: the command, random networks, files and timing."""
