"""What runs where: workers, their limits and sandbox, what passes between them, what is kept."""
