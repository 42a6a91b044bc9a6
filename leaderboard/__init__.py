"""Results: database, statistics and reports. Imports no torch and no other room."""
