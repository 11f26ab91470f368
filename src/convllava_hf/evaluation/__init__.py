"""Scores that equal the original projects' own, and what it takes to measure and show them."""
