"""Who is treated and who is not, by lot, and what the difference was."""
