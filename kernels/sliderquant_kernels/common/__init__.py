"""What the ops share: layouts, choices, launch plans, device functions."""
