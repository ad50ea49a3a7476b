"""Serving: a published model checked, loaded and asked, without torch."""
