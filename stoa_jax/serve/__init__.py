"""The page: search a library of videos, and see what was found and why."""
