"""Operations with a readable reference and, where one wins, a kernel."""
