"""Every move and every problem, before anything is written."""
