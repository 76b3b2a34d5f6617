"""`sweep`: many strengths, ranks and layers measured, one of them chosen under a limit of damage."""
