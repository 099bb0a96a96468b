"""The browser side in real Chromium, on the real front end."""
