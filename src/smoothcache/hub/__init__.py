"""Schedules and calibrations on the Hugging Face hub: files of data and a card, never code."""
