"""mergekit: its configurations read and given their meaning, and the tool itself run as a process."""
