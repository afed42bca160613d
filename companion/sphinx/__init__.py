"""Extensions of the book's builder: `rim_book` (scripts, drawings, repairs) and `rim_api` (the API page)."""
