"""Profiles of models side by side: tables, figures and a page, made from JSON alone."""
