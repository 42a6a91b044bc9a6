"""Preference studies (two-alternative forced choice): design, serving, votes and their statistics."""
