"""The cockpit of notebook 3: rows and rotation to switch, alive without a kernel.

`small_head` computes the numbers of one head, `still` draws them as a picture, and `fragment` puts
both into one piece of HTML with `cockpit.js` and `cockpit.css`.
"""

from llamaconv.notebook.cockpit.fragment import Cockpit as Cockpit
from llamaconv.notebook.cockpit.fragment import cockpit as cockpit
