"""Text of many kinds, written for this package: what a calibration on somebody's own data may never have seen."""

GENERAL_TEXT = (
    "The ferry left at a quarter past nine, and by noon the island was a grey line behind us.",
    "def area(width: float, height: float) -> float:\n    return width * height\n\nprint(area(3.0, 4.5))",
    "To make the dough, mix 500 g of flour with 320 ml of water, two pinches of salt and a little yeast; wait an hour.",
    "Q: What is 17 times 6?\nA: 17 times 6 is 102, because 10 times 6 is 60 and 7 times 6 is 42.",
    "Der Zug nach Hamburg hat heute etwa zwanzig Minuten Verspätung; bitte achten Sie auf die Anzeigen.",
    "El museo abre de martes a domingo, y los miércoles por la tarde la entrada no cuesta nada.",
    "Dear Ms Okafor, thank you for your letter of 3 May. We shall send the two missing parts by Friday. Yours, R. Lind",
    "The enzyme binds its substrate in a narrow pocket, so that a single changed residue can stop the reaction.",
    '{"name": "lamp", "price": 24.90, "colours": ["white", "black"], "in_stock": true}',
    'He laughed. "You walked all that way for a spoon?" - "It was my grandmother\'s," she said, and sat down.',
    "SELECT city, COUNT(*) FROM visits WHERE year >= 2019 GROUP BY city ORDER BY 2 DESC LIMIT 5;",
    "Clause 4.2: The tenant shall give notice in writing at least three months before the end of the term.",
)
