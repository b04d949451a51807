"""What a person does with the page, in Chromium."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, TimeoutError

from taps_hf.demo.prompts import EXAMPLES

_PATIENCE = 60_000  # milliseconds: the machine may be busy with other things


class Visitor:
    """Someone at the page. Notes every error in the browser's console."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        page.set_default_timeout(_PATIENCE)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        self.button("generate").wait_for()

    def button(self, name: str) -> Locator:
        return self.page.locator(f"#{name}")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def unfold(self, title: str) -> None:
        """Show a part of the form."""
        self.page.get_by_role("checkbox", name=title).check()

    def ask(self, prompt: str | None = None, strategy: str | None = None, **numbers) -> None:
        """Fill in the form; `numbers` by the sliders' labels, with _ for blanks."""
        if prompt is not None:
            self.page.locator("#prompt textarea").fill(prompt)
        if strategy is not None:
            self.page.locator("#strategy input").click()
            self.page.get_by_role("option", name=strategy, exact=True).click()
        if numbers:
            self.unfold("Temperature, length, trees")
        for name, value in numbers.items():
            self.number(name.replace("_", " "), value)

    def example(self, name: str) -> None:
        """Choose an example prompt."""
        self.page.get_by_role("button", name=name).click()
        assert self.page.locator("#prompt textarea").input_value() == EXAMPLES[name]

    def number(self, label: str, value: float) -> None:
        if label == "Seed":
            field = self.page.locator("#seed input")
        else:
            field = self.page.get_by_label(f"number input for {label}")
        # What a tab holds is set up in the first frame that shows it. Nobody types before, nor
        # does this: a click waits for two frames in which the field stands still.
        field.click()
        field.fill(str(value))
        field.press("Tab")

    def generate(self) -> str:
        """Press the button and wait for the end; returns the answer."""
        self.start("generate")
        self.wait_for_the_end("generate")
        return self.answer()

    def start(self, what: str) -> None:
        """Press "generate" or "compare", and wait until something is written."""
        where = "#answer" if what == "generate" else "#comparison"
        numbered = f"{where} [data-number]"
        earlier = self.page.locator(numbered)
        old = earlier.first.get_attribute("data-number") if earlier.count() else 0
        self.button(what).click()
        try:
            self.page.locator(f"{numbered}:not([data-number='{old}']) .tok").first.wait_for()
        except TimeoutError as error:
            said = self.page.locator(".taps-notice, .toast-body").all_inner_texts()
            pressed = self.button(what).is_disabled()
            raise AssertionError(
                f"Nothing was written after {what!r} was pressed (heard: {pressed}). The page says "
                f"{said}, its console {self.errors}."
            ) from error

    def wait_for_the_end(self, of: str) -> None:
        """After [`start`]: until all that comes of it is shown."""
        self.page.locator(f"#{of}:not([disabled])").wait_for()

    def answer(self) -> str:
        return self.page.locator("#answer .text").inner_text()

    def figure(self, name: str) -> str:
        return self.page.locator(f"#figures dd[data-figure='{name}']").inner_text()

    def is_told(self, message: str) -> None:
        """Wait for a message in the page about what is wrong."""
        self.page.locator(".taps-notice").get_by_text(message).filter(visible=True).wait_for()

    def fits_the_screen(self) -> None:
        """Wait until the page is no wider than the screen."""
        root = "document.documentElement"
        self.page.wait_for_function(f"{root}.scrollWidth <= {root}.clientWidth")
