# SPDX-License-Identifier: Apache-2.0
"""Long campaigns of faults, run by hand: ``make campaign``. The tests hold a small part of each."""

import time

BEGUN = time.time()  # before the imports, which count, too
