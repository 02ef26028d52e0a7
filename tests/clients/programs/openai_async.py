"""Many chats at once, and one that nobody reads to its end."""

import asyncio

import openai

MODEL = "baton-tiny"


async def story(client: openai.AsyncOpenAI, about: str) -> str:
    text = ""
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"Tell me a story about a {about}."}],
        temperature=0,
        max_tokens=40,
        stream=True,
    )
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    return text


async def main() -> None:
    abouts = ["fox", "runner", "king", "river"]
    async with openai.AsyncOpenAI(max_retries=0) as client:
        together = await asyncio.gather(*(story(client, about) for about in abouts))
        assert together == [await story(client, about) for about in abouts]
        assert all(together)

        asked = {"model": MODEL, "temperature": 0}
        message = {"role": "user", "content": "Tell me a story about a fox."}
        async with client.chat.completions.stream(**asked, messages=[message], max_tokens=40) as stream:
            pieces = [event.delta async for event in stream if event.type == "content.delta"]
        assert "".join(pieces) == together[0]
        async with client.responses.stream(**asked, input=[message], max_output_tokens=40) as stream:
            pieces = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        assert "".join(pieces) == together[0]

        messages = [{"role": "user", "content": "Count to a thousand."}]
        long = {"model": MODEL, "messages": messages, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
        async with await client.chat.completions.create(**long, stream=True) as stream:
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break

        try:
            await client.with_options(timeout=0.05).chat.completions.create(**long)
        except (
            openai.APITimeoutError,
            openai.InternalServerError,
        ) as late:  # the client's clock, or the server's, which was told of it
            assert isinstance(late, openai.APITimeoutError) or late.status_code == 504
        else:
            raise AssertionError("1,500 tokens came within 50 ms")
        assert await story(client, "fox") == together[0]


asyncio.run(main())
