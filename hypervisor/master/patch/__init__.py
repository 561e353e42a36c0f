"""The four ways to patch an object: JSON, merge, strategic merge and server-side apply."""
