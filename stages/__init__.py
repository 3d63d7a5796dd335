"""The commands of `pipe`, one file each; nothing here is meant to be imported by other programs."""
