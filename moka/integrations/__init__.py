"""Thin plug-ins for programs of others; each is imported by that program, and by nothing in moka."""
