// What Ollama makes of a Modelfile, of conversations and of answers, by Go's own text/template and by Ollama's rules, in
// https://github.com/ollama/ollama/blob/main: ParseFile in parser/parser.go, the types in api/types.go, Execute and
// collate in template/template.go, shouldPreferChatTemplate in server/images.go, tools/ and thinking/.
//
//	echo '{"modelfile": "...", "conversations": [[{"role": "user", "content": "..."}]]}' | go run ollama.go
//
// writes {"commands": [["model", "..."], ...], "prompts": ["..."], ...}. Optional: "tools" and "think" of the
// conversations, "answers" (texts of the model) and "chat_template" (of the GGUF file).
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"text/template/parse"
	"unicode"
)

type message struct {
	Role, Content, Thinking string
	ToolCalls               []toolCall `json:"tool_calls"`
}

type toolCall struct {
	Function struct {
		Name      string
		Arguments map[string]any
	}
}

// What Ollama keeps of a tool. Ollama's templates get the properties as a map, so in alphabetical order.
type tool struct {
	Type     string
	Function struct {
		Name, Description string
		Parameters        struct {
			Type       string              `json:"type"`
			Required   []string            `json:"required,omitempty"`
			Properties map[string]property `json:"properties"`
		}
	}
}

type property struct {
	AnyOf       []property          `json:"anyOf,omitempty"`
	Type        propertyType        `json:"type,omitempty"`
	Items       any                 `json:"items,omitempty"`
	Description string              `json:"description,omitempty"`
	Enum        []any               `json:"enum,omitempty"`
	Properties  map[string]property `json:"properties,omitempty"`
}

type propertyType []string

func (types *propertyType) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*types = []string{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(types))
}

func (types propertyType) MarshalJSON() ([]byte, error) {
	if len(types) == 1 {
		return json.Marshal(types[0])
	}
	return json.Marshal([]string(types))
}

func (types propertyType) String() string {
	if len(types) == 1 {
		return types[0]
	}
	return fmt.Sprint([]string(types))
}

func main() {
	var given struct {
		Modelfile     string
		Conversations [][]message
		Tools         []tool
		Think         *bool
		Answers       []string
		ChatTemplate  string `json:"chat_template"`
	}
	check(json.NewDecoder(os.Stdin).Decode(&given))
	commands, prompts, answers, uses := parseFile(given.Modelfile), []string{}, []message{}, "chat template"
	parser := slices.ContainsFunc(commands, func(command [2]string) bool { return command[0] == "parser" })
	for _, command := range commands {
		if command[0] == "template" {
			functions := template.FuncMap{"json": func(value any) string { return string(must(json.Marshal(value))) }}
			parsed := must(template.New("").Option("missingkey=zero").Funcs(functions).Parse(command[1]))
			for _, conversation := range given.Conversations {
				prompts = append(prompts, fill(parsed, conversation, given.Tools, given.Think))
			}
			for _, answer := range given.Answers {
				if parser { // passthrough
					answers = append(answers, message{Content: answer})
				} else {
					answers = append(answers, understand(parsed, answer, given.Tools))
				}
			}
			if parser || !prefersChatTemplate(parsed, command[1], given.ChatTemplate) {
				uses = "TEMPLATE"
			}
		}
	}
	made := map[string]any{"commands": commands, "prompts": prompts, "answers": answers, "uses": uses}
	check(json.NewEncoder(os.Stdout).Encode(made))
}

func fill(parsed *template.Template, conversation []message, tools []tool, think *bool) string {
	var merged []*message
	var system []string
	for _, each := range conversation {
		if each.Role == "system" {
			system = append(system, each.Content)
		}
		if last := len(merged) - 1; last >= 0 && merged[last].Role == each.Role && each.Role != "tool" {
			merged[last].Content += "\n\n" + each.Content
		} else {
			merged = append(merged, &each)
		}
	}
	var prompt strings.Builder
	check(parsed.Execute(&prompt, map[string]any{
		"Messages":   merged,
		"System":     strings.Join(system, "\n\n"),
		"Tools":      tools,
		"Think":      think != nil && *think,
		"IsThinkSet": think != nil,
	}))
	return prompt.String()
}

// Whether Ollama takes the chat template in the GGUF file, if the Modelfile has no PARSER: if that has more.
func prefersChatTemplate(parsed *template.Template, text, chatTemplate string) bool {
	opening, _ := thinkingTags(parsed)
	has := count(strings.Contains(text, ".Tools"), opening != "")
	chatTools := strings.Contains(chatTemplate, "tools") || strings.Contains(chatTemplate, "tool_call")
	chatHas := count(chatTools, strings.Contains(chatTemplate, "<think>") && strings.Contains(chatTemplate, "</think>"))
	returns := strings.Contains(text, ".ToolCalls") && strings.Contains(text, `eq .Role "tool"`)
	return chatHas > has || (chatHas == has && chatTools && !returns)
}

func count(those ...bool) (number int) {
	for _, each := range those {
		if each {
			number++
		}
	}
	return number
}

// The message that Ollama makes of an answer's text, if the Modelfile has no PARSER.
func understand(parsed *template.Template, text string, tools []tool) (made message) {
	made.Content = text
	if opening, closing := thinkingTags(parsed); opening != "" {
		if rest, thinks := strings.CutPrefix(strings.TrimLeftFunc(text, unicode.IsSpace), opening); thinks {
			made.Thinking, made.Content, _ = strings.Cut(strings.TrimLeftFunc(rest, unicode.IsSpace), closing)
			made.Content = strings.TrimLeftFunc(made.Content, unicode.IsSpace)
		}
	}
	if tag, _ := callTag(parsed.Root.Nodes); len(tools) > 0 && tag != "" {
		var calls string
		made.Content, calls, _ = strings.Cut(made.Content, tag)
		made.ToolCalls = findCalls([]byte(tag+calls), tools)
	}
	return made
}

// Calls start with the first name of a tool. Their arguments are in the first object.
func findCalls(text []byte, tools []tool) (calls []toolCall) {
	for {
		var call toolCall
		end := len(text)
		for _, each := range tools {
			if at := bytes.Index(text, []byte(each.Function.Name)); at >= 0 && at < end {
				end, call.Function.Name = at, each.Function.Name
			}
		}
		object := bytes.IndexByte(text, '{')
		if call.Function.Name == "" || object < 0 {
			return calls
		}
		var data struct{ Arguments map[string]any }
		decoder := json.NewDecoder(bytes.NewReader(text[object:]))
		if decoder.Decode(&data) != nil {
			return calls
		}
		call.Function.Arguments = data.Arguments
		calls, text = append(calls, call), text[object+int(decoder.InputOffset()):]
	}
}

// The first text in the first `if` with .ToolCalls, if no action comes before the text.
func callTag(nodes []parse.Node) (tag string, found bool) {
	for _, node := range nodes {
		if branch := branchOf(node); branch != nil {
			if _, isIf := node.(*parse.IfNode); isIf && uses(branch.Pipe, "ToolCalls") {
				tag, _, _ := strings.Cut(strings.TrimSpace(firstText(branch.List.Nodes)), "{")
				return tag, true
			}
			for _, list := range listsOf(branch) {
				if tag, found := callTag(list.Nodes); found {
					return tag, true
				}
			}
		}
	}
	return "", false
}

func firstText(nodes []parse.Node) string {
	for _, node := range nodes {
		if text, isText := node.(*parse.TextNode); isText {
			return string(text.Text)
		}
		if branch := branchOf(node); branch != nil {
			for _, list := range listsOf(branch) {
				if text := firstText(list.Nodes); text != "" {
					return text
				}
			}
		}
		return ""
	}
	return ""
}

// The first and the last text around .Thinking in a range over .Messages.
func thinkingTags(parsed *template.Template) (opening, closing string) {
	var search func(list *parse.ListNode, inMessages bool)
	search = func(list *parse.ListNode, inMessages bool) {
		for _, node := range list.Nodes {
			action, isAction := node.(*parse.ActionNode)
			branch := branchOf(node)
			if inMessages && (isAction && uses(action.Pipe, "Thinking") || branch != nil && uses(branch.Pipe, "Thinking")) {
				if first, isText := list.Nodes[0].(*parse.TextNode); isText {
					opening = strings.TrimSpace(string(first.Text))
				}
				if last, isText := list.Nodes[len(list.Nodes)-1].(*parse.TextNode); isText {
					closing = strings.TrimSpace(string(last.Text))
				}
			}
			if branch != nil {
				_, isRange := node.(*parse.RangeNode)
				for _, inner := range listsOf(branch) {
					search(inner, inMessages || isRange && uses(branch.Pipe, "Messages"))
				}
			}
		}
	}
	search(parsed.Root, false)
	return opening, closing
}

func branchOf(node parse.Node) *parse.BranchNode {
	switch node := node.(type) {
	case *parse.IfNode:
		return &node.BranchNode
	case *parse.RangeNode:
		return &node.BranchNode
	case *parse.WithNode:
		return &node.BranchNode
	}
	return nil
}

func listsOf(branch *parse.BranchNode) []*parse.ListNode {
	if branch.ElseList == nil {
		return []*parse.ListNode{branch.List}
	}
	return []*parse.ListNode{branch.List, branch.ElseList}
}

func uses(pipe *parse.PipeNode, field string) bool {
	for _, command := range pipe.Cmds {
		for _, argument := range command.Args {
			if name, isField := argument.(*parse.FieldNode); isField && slices.Contains(name.Ident, field) {
				return true
			}
		}
	}
	return false
}

var known = []string{"from", "license", "template", "system", "adapter", "renderer", "parser", "parameter", "message"}

func parseFile(modelfile string) [][2]string {
	commands := [][2]string{}
	for rest := strings.TrimSpace(modelfile); rest != ""; rest = strings.TrimSpace(rest) {
		if rest[0] == '#' {
			_, rest = cut(rest, "\r\n")
			continue
		}
		var name, value string
		name, rest = cut(rest, " \t")
		if name = strings.ToLower(name); !slices.Contains(known, name) {
			log.Fatalf("%q is no command", name)
		}
		if name == "parameter" {
			name, rest = cut(rest, " \t")
		}
		value, rest = cutValue(rest)
		commands = append(commands, [2]string{name, value})
	}
	return commands
}

func cut(text, at string) (string, string) {
	if i := strings.IndexAny(text, at); i >= 0 {
		return text[:i], text[i+1:]
	}
	return text, ""
}

// A value ends with the first line that closes its quotes. Nothing in it is escaped, and what is not printable is lost.
func cutValue(text string) (string, string) {
	for end, r := range text + "\n" {
		if r == '\n' || r == '\r' {
			if value, closed := unquote(strings.TrimSpace(strings.Map(printable, text[:end]))); closed {
				return value, text[end:]
			}
		}
	}
	log.Fatalf("a value does not end: %s", text)
	return "", ""
}

func printable(r rune) rune {
	if strconv.IsPrint(r) || strings.ContainsRune("\t\r\n", r) {
		return r
	}
	return -1
}

func unquote(text string) (string, bool) {
	for _, quote := range []string{`"""`, `"`} {
		if inner, quoted := strings.CutPrefix(text, quote); quoted {
			return strings.CutSuffix(inner, quote)
		}
	}
	return text, true
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func must[T any](made T, err error) T {
	check(err)
	return made
}
