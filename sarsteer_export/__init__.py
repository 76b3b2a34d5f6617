"""sarsteer-export."""
