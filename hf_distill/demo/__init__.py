# SPDX-License-Identifier: Apache-2.0
"""A demonstration on bundled data: `make demo`."""
